"""Training on own samples: reinforcement and distillation. Imports no torch.

    post:
      method: reinforce
      domains:
        - {name: arithmetic, prompts: sums.jsonl, checker: exact_answer}
      prompts_per_step: 16
      samples_per_prompt: 8
      max_new_tokens: 256

The steps of such a run train on what the model itself answers to prompts, in place of the rows of
shards (docs/post-training.md).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.section import PathText
from data.storage import absolute
from data.text.messages import Effort
from model.config import LossWeight
from trainer.config.section import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0, le=10**6)]
Count = Annotated[int, Field(gt=0, le=10**9)]


class DomainConfig(Section):
    """Prompts of one kind, and what an answer to them is worth."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="letters, digits, and `_.-` except in front",
    )
    """Unique name, in metrics and rollouts."""
    prompts: PathText
    """JSON lines, each with `messages`, which end in a user's turn, or with `prompt`, plain text;
    the checker reads the other fields."""
    checker: str | None = None
    """Function that scores an answer: its name among the built-in ones, or `package.module:name`
    or `folder/file.py:name` of your own (docs/post-training.md). `reinforce` needs one; with
    `distil` it only measures."""
    weight: Weight = 1.0
    """Share of a step's prompts, relative to the other domains."""
    teacher: str | None = None
    """Run folder or Hugging Face folder of the model that `distil` learns from in this domain."""


class LengthRule(Section):
    """What long samples of one mode of thinking lose of their reward."""

    free: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Length up to which nothing is lost. [tokens]"""
    limit: Count = 32768
    """Length at which all of `weight` is lost; in between the loss is linear. [tokens]"""
    weight: Fraction = 0.0
    """The largest loss of reward."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        """`limit` is above `free`."""
        if self.limit <= self.free:
            raise ValueError(f"limit = {self.limit} should be above free = {self.free}")
        return self


class LengthPenaltyConfig(Section):
    """The length penalty of each mode of thinking; none loses most, max loses least."""

    none: LengthRule = LengthRule()
    """Without thinking."""
    high: LengthRule = LengthRule()
    """The usual effort."""
    max: LengthRule = LengthRule()
    """The maximum effort."""

    def of(self, effort: Effort) -> LengthRule:
        """Returns the rule of a mode."""
        rule: LengthRule = getattr(self, effort)
        return rule

    @model_validator(mode="after")
    def _is_weaker_with_effort(self) -> Self:
        """`high` loses no more than `none`, and `max` no more than `high`."""
        for less, more in (("none", "high"), ("high", "max")):
            strict, lenient = getattr(self, less), getattr(self, more)
            if (
                lenient.free < strict.free
                or lenient.limit < strict.limit
                or lenient.weight > strict.weight
            ):
                raise ValueError(
                    f"{more} should not be penalised more than {less}: its weight should be at "
                    f"most {strict.weight}, its free at least {strict.free} and its limit at "
                    f"least {strict.limit}"
                )
        return self


class PolicyConfig(Section):
    """Group-relative policy optimisation, of `method` = reinforce."""

    divide_by_std: bool = False
    """Divide advantages by the standard deviation of their group."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Ratios of probabilities below 1 - clip_low have no gradient for negative advantages."""
    clip_high: Annotated[float, Field(gt=0.0, le=10**6)] = 0.2
    """Ratios above 1 + clip_high have no gradient for positive advantages."""
    kl_weight: Weight = 0.0
    """Weight of the KL divergence to `post.reference`."""
    length: LengthPenaltyConfig = LengthPenaltyConfig()
    """Penalty for long samples."""


class SandboxConfig(Section):
    """Limits of code that a checker runs; docs/post-training.md says what isolates it."""

    cpu_seconds: Count = 5
    """CPU time of a program. [s]"""
    wall_seconds: Annotated[float, Field(gt=0, le=10**6)] = 10.0
    """Time until a program is killed. [s]"""
    memory: Annotated[int, Field(ge=2**26, le=2**50)] = 2**29
    """Address space of a program. [bytes]"""
    files: Annotated[int, Field(ge=2**12, le=2**50)] = 2**24
    """Size of the files in a program's own folder, together. [bytes]"""
    output: Annotated[int, Field(ge=2**10, le=2**30)] = 2**16
    """What a program may print; more ends it. [bytes]"""
    readable: tuple[PathText, ...] = ()
    """Folders that programs may read, such as a site-packages folder, beyond Python's standard
    library."""
    unisolated: bool = False
    """Run programs without isolation, with limits and a time limit alone, where the kernel cannot
    confine them: they then can read, write and send what this user can."""


class PostConfig(Section):
    """Training on own samples instead of shards (docs/post-training.md)."""

    method: Literal["reinforce", "distil"]
    """`reinforce`: group-relative policy optimisation of the checkers' rewards. `distil`: reverse
    KL to the teacher of each domain, over the whole vocabulary."""
    domains: tuple[DomainConfig, ...] = Field(min_length=1)
    """The prompts, by domain."""
    prompts_per_step: Count
    """Prompts of a rollout, over all domains and ranks. [prompts]"""
    samples_per_prompt: Count = 1
    """Answers to each of them, which `reinforce` compares with each other. [samples]"""
    max_new_tokens: Count = 256
    """Maximum length of an answer. [tokens]"""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of sampling, and of the distribution that is trained."""
    efforts: dict[Effort, Weight] = Field(default={"none": 1.0})
    """Share of the prompts that are asked in each mode of thinking; plain text has none."""
    steps_per_rollout: Count = 1
    """Updates on one set of samples. [steps]"""
    sandbox: SandboxConfig = SandboxConfig()
    checker_workers: Count | None = None
    """Answers that a process scores at a time; null: one for each CPU core that it may use.
    [processes]"""
    checker_seconds: Annotated[float, Field(gt=0, le=10**6)] = 60.0
    """Time until a checker that does not return is killed; the answer then gets reward 0. [s]"""
    policy: PolicyConfig = PolicyConfig()
    mtp_loss_weight: LossWeight = 0.0
    """Weight of the MTP head's cross-entropy on the answers, in place of the run's; its gradient
    also reaches the layers before the head."""
    reference: str | None = None
    """Run folder or Hugging Face folder of the model that `policy.kl_weight` stays close
    to."""
    keep_rollouts: Count = 20
    """How many of the newest rollouts stay in the run folder. [rollouts]"""

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        """Domains have different names, and what `method` needs of them: a checker or a teacher."""
        names = [domain.name for domain in self.domains]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two domains have the name {twice[0]!r}; names should differ")
        needed = "checker" if self.method == "reinforce" else "teacher"
        for number, domain in enumerate(self.domains):
            if getattr(domain, needed) is None:
                raise ValueError(
                    f"domains.{number}, {domain.name}, has no {needed}, which method = "
                    f"{self.method} needs"
                )
        return self

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        """`samples_per_prompt` is at least 2 with reinforce; weights do not sum to 0."""
        if self.method == "reinforce" and self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt = 1 leaves nothing to compare an answer with; it should be at "
                "least 2 with method = reinforce"
            )
        weights = {"domains": [domain.weight for domain in self.domains]}
        for key, values in (weights | {"efforts": [*self.efforts.values()]}).items():
            if not sum(values):
                raise ValueError(f"the weights of {key} sum to 0; one of them should be more")
        return self

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        """`policy.kl_weight` above 0 and `reference` need each other."""
        weight = self.policy.kl_weight
        if (weight > 0) != (self.reference is not None):
            raise ValueError(
                f"policy.kl_weight = {weight} and reference = {self.reference} do not fit: a "
                "weight above 0 needs a reference, and a reference a weight"
            )
        return self

    @model_validator(mode="after")
    def _waits_for_programs(self) -> Self:
        """`checker_seconds` is more than `sandbox.wall_seconds`."""
        if self.checker_seconds <= self.sandbox.wall_seconds:
            raise ValueError(
                f"checker_seconds = {self.checker_seconds:g} should be more than "
                f"sandbox.wall_seconds = {self.sandbox.wall_seconds:g}, the time of one program"
            )
        return self

    @property
    def models(self) -> list[str]:
        """The folders of teachers and the reference, without repetition."""
        teachers = [domain.teacher for domain in self.domains if self.method == "distil"]
        return [*dict.fromkeys(folder for folder in (*teachers, self.reference) if folder)]

    def with_absolute_paths(self) -> Self:
        """Returns the same settings with paths that mean the same from any working directory."""

        def domain_of(domain: DomainConfig) -> DomainConfig:
            paths = {"prompts": absolute(domain.prompts)}
            file, _, name = (domain.checker or "").rpartition(":")
            if file.endswith(".py"):
                paths["checker"] = f"{absolute(file)}:{name}"
            if domain.teacher is not None:
                paths["teacher"] = absolute(domain.teacher)
            return domain.model_copy(update=paths)

        update: dict[str, object] = {"domains": tuple(map(domain_of, self.domains))}
        if self.reference is not None:
            update["reference"] = absolute(self.reference)
        return self.model_copy(update=update)
