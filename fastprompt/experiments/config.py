"""StudyConfig: what a study runs, as its YAML file says."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastprompt._settings import check_fields, read_yaml
from fastprompt.data.presets import TASKS
from fastprompt.data.reading import check_count

from .records import FROZEN, RETRIEVAL, STUDIES
from .settings import RunSettings, run_settings

_PARTS = ("alignment", "adapters", "norms")


@dataclass(frozen=True)
class StudyConfig:
    """A grid of runs: methods x numbers of examples x seeds (x variants, in the study "pseudo").

    Attributes:
        study: "scarcity", "stability" or "pseudo": what the report looks at.
        task: "xquad", "mlqa", "pawsx" or "retrieval".
        backbone: folder of a model, or its name on the hub.
        data: of the task, as in `fastprompt.data.presets.read_examples`; for retrieval not used.
        languages: to be scored. "de@test" takes another split than `test_split`. For retrieval those of `parallel`.
        train_split, validation_split, test_split: as `split` of `read_examples`.
        source: language of the labelled examples.
        methods: of `AdapterConfig`, with "+alignment", "+adapters" and "+norms" as wanted; and "frozen", the backbone
            as it is, with a head as it begins.
        examples: numbers of labelled examples; "all" for all.
        seeds: seeds of what is random in a run.
        parallel: language -> parallel text: a file, as `fastprompt.data.parallel.read_pairs` takes it, or {"pawsx",
            "split"}: data and split of PAWS-X, whose rows are translations of each other; a third column, and labels,
            are not read.
        parallel_test: pairs of each of those files that are kept for the scores (retrieval).
        also: task -> {"data", "languages", "split"}: of another task of the same kind, scored with the same runs.
        test_limit: score so many examples of each language, evenly spread. None: all.
        alignment: weight of the alignment loss in methods that have it; for retrieval, where there is nothing else, 1.
        adapter_size: in methods that have adapters.
        settings: for all runs: of `AdapterConfig`, `InputConfig` and `TrainingArguments`, by their fields' names, and
            of `AlignmentConfig` by those of the command line, such as alignment_form, for methods that have it.
        examples_settings: number of examples, or "all" -> settings of its own, as more steps for more examples.
        method_settings: method -> settings of its own, before all others.
        variants: of the study "pseudo": "real", "pseudo" (labels made without labels) and "pseudo+real".
        pseudo_examples: so many are made.
        title: the report's title; "" is the study's and the task's name.
    """

    study: str
    task: str
    backbone: str
    data: str = "."
    languages: Sequence[str] = ()
    train_split: str = "train"
    validation_split: str | None = "dev"
    test_split: str = "test"
    source: str = "en"
    methods: Sequence[str] = ("head", "full", "lora", "prompt", "prefix", "prefix+alignment")
    examples: Sequence[int | str] = (8, 16, 32, 64, 128, 256, "all")
    seeds: Sequence[int] = (0, 1, 2)
    parallel: dict[str, str | dict[str, str]] = field(default_factory=dict)
    parallel_test: int = 200
    also: dict[str, dict] = field(default_factory=dict)
    test_limit: int | None = None
    alignment: float = 1.0
    adapter_size: int = 64
    settings: dict[str, object] = field(default_factory=dict)
    examples_settings: dict[int | str, dict[str, object]] = field(default_factory=dict)
    method_settings: dict[str, dict[str, object]] = field(default_factory=dict)
    variants: Sequence[str] = ("",)
    pseudo_examples: int = 500
    title: str = ""

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, allowed in (("study", STUDIES), ("task", (*TASKS, RETRIEVAL))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        allowed = ("real", "pseudo", "pseudo+real") if self.study == "pseudo" else ("",)
        if not self.variants or not set(self.variants) <= set(allowed):
            raise ValueError(f"variants must be of {allowed} in the study {self.study!r}, got {list(self.variants)}")
        if self.task == RETRIEVAL and self.study == "pseudo":
            raise ValueError("task must have labels for the study 'pseudo', got 'retrieval'")
        if self.task == RETRIEVAL and self.alignment != 1.0:
            raise ValueError(f"alignment must be 1 for retrieval, where there is nothing else, got {self.alignment}")
        for count in self.examples:
            if count != "all" and (type(count) is not int or count < 1):
                raise ValueError(f'examples must be positive integers or "all", got {count!r}')
        if not self.languages and self.task != RETRIEVAL:
            raise ValueError("languages must hold at least one, got none")
        from_pairs = self.task == RETRIEVAL or (self.study, self.task) == ("pseudo", "pawsx")
        if not self.parallel and (from_pairs or any("alignment" in method for method in self.methods)):
            what = f"{self.study} of {self.task}" if from_pairs else "methods with alignment"
            raise ValueError(f"parallel must name a file at least, for {what}, got none")
        for name, of in (("examples_settings", self.examples), ("method_settings", self.methods)):
            unknown = [each for each in getattr(self, name) if each not in of]
            if unknown:
                raise ValueError(f"{name} must be of {list(of)}, got {unknown}")
        for place in self.parallel.values():
            if not isinstance(place, str) and (not isinstance(place, dict) or place.keys() != {"pawsx", "split"}):
                raise ValueError(f"parallel must be a file, or have pawsx and split, for each language, got {place!r}")
        for task, about in self.also.items():
            fits = isinstance(about, dict) and about.keys() == {"data", "languages", "split"}
            if {task, self.task} != {"xquad", "mlqa"} or not fits:
                raise ValueError(f"also must be mlqa beside xquad or the other way round, got {self.also}")
        for count, method in itertools.product(self.examples, self.methods):
            self.run_settings(count, method, 0)

    def _check_kinds(self) -> None:
        """What YAML may easily have otherwise: a word for a list of one, nothing for a list of none."""
        for name in ("languages", "methods", "examples", "seeds", "variants"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} must be a list, got {value!r}")
            if not value and name != "languages":
                raise ValueError(f"{name} must hold at least one, got none")
            if any(each in value[:n] for n, each in enumerate(value)):
                raise ValueError(f"{name} must not hold one twice, got {list(value)}")
        for name in ("parallel", "also", "settings", "examples_settings", "method_settings"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be names and values, got {getattr(self, name)!r}")
        for name in ("parallel_test", "pseudo_examples", "test_limit"):
            if (name, getattr(self, name)) != ("test_limit", None):
                check_count(name, getattr(self, name))
        if not all(type(seed) is int for seed in self.seeds):
            raise ValueError(f"seeds must be integers, got {list(self.seeds)}")

    def run_settings(self, count: int | str, method: str, seed: int) -> RunSettings:
        """What one run is made of, with `count` of `self.examples`."""
        name, *parts = method.split("+")
        if not set(parts) <= set(_PARTS):
            raise ValueError(f"methods must be one of AdapterConfig's with any of {_PARTS}, got {method!r}")
        settings = {**self.settings, **self.examples_settings.get(count, {})}
        if "alignment" in parts:
            settings["alignment"] = self.alignment
        if "adapters" in parts:
            settings["adapter_size"] = self.adapter_size
        if "norms" in parts:
            settings["norms"] = True
        settings |= self.method_settings.get(method, {})
        own = {"method": "head" if method == FROZEN else name, "seed": seed}  # the head of the frozen does not train
        return run_settings(settings, own, alone=self.task == RETRIEVAL)


def read_study(path: str | Path, **given) -> StudyConfig:
    """Read a study's YAML file; what is given and not None is taken instead of what it says.

    Raises:
        FileNotFoundError, ValueError: no such file, no YAML, or a name or value in it that is not as expected.
    """
    path = Path(path)
    about = read_yaml(path)
    about |= {name: value for name, value in given.items() if value is not None}
    names = {each.name for each in dataclasses.fields(StudyConfig)}
    needed = {each.name for each in dataclasses.fields(StudyConfig) if each.name in ("study", "task", "backbone")}
    for what, wrong in (("unknown", about.keys() - names), ("missing", needed - about.keys())):
        if wrong:
            raise ValueError(f"{path}: {what} names {sorted(wrong)}; there are {sorted(names)}")
    try:
        return StudyConfig(**check_fields(StudyConfig, about))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
