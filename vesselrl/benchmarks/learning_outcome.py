"""What the learning benchmark found, as data; `learning_report.py` puts it into words and tables."""

from dataclasses import dataclass, field

from vesselrl.benchmarks.learning_arms import BY_NAME, RL_ARMS
from vesselrl.benchmarks.learning_comparison import Contest, Verdict, dominates, patient_mean
from vesselrl.benchmarks.learning_scores import ArmResult
from vesselrl.evaluation.results import Evaluation


@dataclass(frozen=True)
class EqualRecall:
    """A control at the validation recall of an RL arm, one value per seed."""

    tests: tuple[Evaluation, ...]
    thresholds: tuple[float, ...]
    # Validation recall of the RL arm minus that of the control.
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Claim:
    """A claim about an RL arm against a control, judged over the seeds together and for each alone."""

    name: str  # E2 or E3
    arm: str
    control: str
    verdict: Verdict
    by_seed: tuple[Verdict, ...]

    @property
    def words(self) -> str:
        """The claim, its verdict, and in how many seeds it holds alone."""
        at = " at equal recall" if self.name == "E3" else ""
        text = f"{self.name}, {BY_NAME[self.arm].label}, against {BY_NAME[self.control].label}{at}: "
        alone = sum(verdict.holds for verdict in self.by_seed)
        return f"{text}{self.verdict.words}. Alone it holds in {alone} of {len(self.by_seed)} seeds."


@dataclass
class Outcome:
    """Everything that was found.

    Attributes:
        results: by arm, one per seed.
        together: test scores by arm, each image's as the mean over the seeds.
        contests: (RL arm, control) -> differences over the seeds together.
        equal: (RL arm, control) -> the control at the arm's recall; `at_recall` the differences there.
        best_control: the strongest of C2, C3, C4 and C7 on validation; "" if there is none.
        claims: E2 and E3 of every RL arm.
        curves: by arm, test scores by threshold.
    """

    results: dict[str, list[ArmResult]]
    together: dict[str, Evaluation]
    contests: dict[tuple[str, str], Contest]
    equal: dict[tuple[str, str], EqualRecall]
    best_control: str = ""
    claims: list[Claim] = field(default_factory=list)
    at_recall: dict[tuple[str, str], Contest] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def words(self) -> tuple[str, ...]:
        """The verdicts in words, or why there are none."""
        if not self.claims:
            return ("Nothing can be judged: no RL arm and control have both finished for every seed.",)
        return tuple(claim.words for claim in self.claims)

    def summary(self) -> tuple[str, ...]:
        """One sentence per claim: for which arms it holds, and for which not."""
        sentences = []
        for name in dict.fromkeys(claim.name for claim in self.claims):
            parts = []
            for holds, words in ((True, "holds for"), (False, "does not hold for")):
                those = [c for c in self.claims if (c.name, c.verdict.holds) == (name, holds)]
                listed = "; ".join(
                    f"{BY_NAME[c.arm].label} against {BY_NAME[c.control].label}" for c in those
                )
                parts += [f"{words} {listed}"] if those else []
            sentences.append(f"{name} {'. It '.join(parts)}.")
        return tuple(sentences) or self.words()

    def points(self) -> dict[str, tuple[float, float]]:
        """(Dice, β0 error) on test by arm."""
        return {name: (patient_mean(e, "dice"), patient_mean(e, "beta0_error"))
                for name, e in self.together.items()}  # fmt: skip

    def curve_points(self, rl: bool) -> dict[str, tuple[float, float]]:
        """(Dice, β0 error) on test at every threshold of the RL arms, or of the controls."""
        return {
            f"{BY_NAME[name].label} at {threshold:g}": point
            for name, curve in self.curves.items()
            if (name in RL_ARMS) == rl
            for threshold, *point in zip(
                curve["thresholds"], curve["dice"], curve["beta0_error"], strict=True
            )
        }

    def beaten_by(self, arm: str) -> list[str]:
        """The control points, arms and thresholds, that are as good as an RL arm in Dice and β0 error."""
        points = self.points()
        controls = {BY_NAME[n].label: p for n, p in points.items() if n not in RL_ARMS}
        return [name for name, p in (controls | self.curve_points(rl=False)).items()
                if dominates(tuple(p), points[arm])]  # fmt: skip

    def beats(self, arm: str) -> list[str]:
        """The control arms that an RL arm is as good as in Dice and β0 error, and better in one."""
        points = self.points()
        return [BY_NAME[n].label for n, p in points.items() if n not in RL_ARMS and dominates(points[arm], p)]
