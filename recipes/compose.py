"""From overrides to a typed recipe: Hydra composes the YAML tree once, here; no job ever sees Hydra.

A curriculum is found in this package's own tree or in a team's private folders (`config_dirs`), which come first on Hydra's search
path: a file there adds to a group, or shadows the file of the same group and name here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from recipes.schema import Recipe, RecipeError, describe

if TYPE_CHECKING:
    from omegaconf import DictConfig

TREE = Path(__file__).resolve().parent
"""The published tree."""
PRIMARY = "recipe"
_config_dirs: ContextVar[tuple[Path, ...]] = ContextVar("_config_dirs", default=())


def compose(overrides: Sequence[str] = (), config_dirs: Iterable[Path | str] = ()) -> Recipe:
    """Compose, resolve and validate a recipe.

    `overrides` are in Hydra's grammar (`model=granite_4_1_3b`, `phase.foundation.tokens=1e11`, `+extra.owner=me`, `~phase.x`).
    `tokens` is resolved to whole steps: steps = ceil(tokens / (batch * length)), tokens = steps * batch * length, and what was asked
    for stays in `tokens_requested`. A phase, merge, sft, grpo, ab or export that is null does not exist, nor does a source.

    Raises RecipeError, which says what is wrong and what would be right. The result is not linted: see `recipes.lint.check`.
    """
    raw = _container(overrides, [Path(d) for d in config_dirs])
    for section in ("phase", "merge", "sft", "grpo", "ab", "export"):
        raw[section] = _without_nulls(raw.get(section) or {})
    for holder in (raw["data"], *raw["sft"].values()):
        if isinstance(holder.get("sources"), dict):
            holder["sources"] = _without_nulls(holder["sources"])
    _check_stages(raw)
    problems: list[str] = []
    for name, phase in raw["phase"].items():
        problems += _resolve_tokens(f"phase.{name}", phase)
    if problems:
        raise RecipeError("; ".join(problems))
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(describe(error)) from None


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def composed_yaml(overrides: Sequence[str] = (), config_dirs: Iterable[Path | str] = ()) -> str:
    """The composed recipe as YAML, as Hydra sees it: before tokens become steps. For `quarry plan --cfg`."""
    from omegaconf import OmegaConf

    with _composed(overrides, [Path(d) for d in config_dirs]) as config:
        return OmegaConf.to_yaml(config)


def option(group: str, name: str, config_dirs: Iterable[Path | str] = ()) -> dict[str, Any]:
    """What the choice `group=name` holds, e.g. option("precision", "bf16"); RecipeError for one that does not exist."""
    import hydra
    from omegaconf import OmegaConf

    folders = [Path(d) for d in config_dirs]
    known = known_options(group, folders)
    if name not in known:
        raise RecipeError(f"{group}: no '{name}'; known: {', '.join(known)}{_nearest(name, known)}")
    _register_search_path_plugin()
    _spare_interpolation_maps()
    _read_yaml_by_libyaml()
    token = _config_dirs.set(tuple(folder.resolve() for folder in folders))
    try:
        with hydra.initialize_config_dir(str(TREE), version_base="1.3", job_name="quarry"):
            config = hydra.compose(f"{group}/{name}")
    finally:
        _config_dirs.reset(token)
    # An option lies where its folder says: parallel/granite_4_1_8b/4k at parallel.granite_4_1_8b.
    found = OmegaConf.select(config, f"{group}/{name}".rpartition("/")[0].replace("/", "."))
    return OmegaConf.to_container(found, resolve=True)  # type: ignore[return-value]


def known_options(group: str, config_dirs: Iterable[Path | str] = ()) -> list[str]:
    """Names that `group=NAME` may take, from the published tree and from the private folders, sorted."""
    names = set()
    for root in [*map(Path, config_dirs), TREE]:
        for file in (root / group).rglob("*.yaml"):
            if not file.name.startswith("_"):
                names.add(file.relative_to(root / group).with_suffix("").as_posix())
    return sorted(names)


def _container(overrides: Sequence[str], config_dirs: list[Path]) -> dict[str, Any]:
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _composed(overrides, config_dirs) as config:
        try:
            raw = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = error.full_key
            raise RecipeError(f"{key}: has no value (??? in the tree); give one in the curriculum, or {key}=VALUE") from None
        except OmegaConfBaseException as error:
            raise RecipeError(f"{error.full_key or 'recipe'}: {error.msg or error}") from None
    # A curriculum's choice of precision is the default of its phases; each phase has its own copy, so this one has no further use.
    raw.pop("precision", None)
    return raw


@contextmanager
def _composed(overrides: Sequence[str], config_dirs: list[Path]) -> Iterator[DictConfig]:
    """Yield the DictConfig of the composed recipe, with Hydra's global state as it was before."""
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = []
    for folder in config_dirs:
        if not folder.is_dir():
            raise RecipeError(
                f"--config-dir {folder}: no such folder; it holds groups as the recipes tree does, e.g. mixture/mine.yaml"
            )
        folders.append(folder.resolve())
    _register_search_path_plugin()
    _spare_interpolation_maps()
    _read_yaml_by_libyaml()
    token = _config_dirs.set(tuple(folders))
    try:
        with hydra.initialize_config_dir(str(TREE), version_base="1.3", job_name="quarry"):
            config = hydra.compose(PRIMARY, list(overrides), return_hydra_config=True)
            choice = OmegaConf.select(config, "hydra.runtime.choices.precision")
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            touched = config_dirs or any(override.lstrip("+~").startswith("precision.") for override in overrides)
            if touched and choice and config.get("precision") != hydra.compose(f"precision/{choice}").get("precision"):
                raise RecipeError(
                    "precision: its values were changed for the whole curriculum, but each phase has its own copy of them; "
                    "set phase.NAME.precision.KEY, or write a file precision/NAME.yaml in a folder of yours (--config-dir)"
                )
            yield config
    except HydraException as error:
        raise RecipeError(_explain_hydra(error, overrides, config_dirs)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{error.full_key or 'recipe'}: {error.msg or error}") from None
    finally:
        _config_dirs.reset(token)


@cache
def _read_yaml_by_libyaml() -> None:
    """Let OmegaConf 2.3 parse with libyaml, by its own rules for keys and scalars: it takes PyYAML's parser in Python, and makes the class anew
    for each of our sixty files, which is an eighth of the time of composing a recipe."""
    import yaml
    from omegaconf import _utils

    if not yaml.__with_libyaml__:
        return
    slow = _utils.get_yaml_loader()

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers = slow.yaml_implicit_resolvers
        yaml_constructors = slow.yaml_constructors

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """ConstructorError for a key that stands twice, as OmegaConf's own loader raises it."""
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag == yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            "while constructing a mapping", node.start_mark, f"found duplicate key {key.value}", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    _utils.get_yaml_loader = lambda: Loader


@cache
def _spare_interpolation_maps() -> None:
    """Let Hydra 1.3 make the map that names in a defaults list are interpolated from (`${model}/4k`) only for lists that have such names.

    It makes one, of all choices so far, for each of our hundred-odd files, which is a third of the time of composing a recipe; for a list
    without interpolations it is never looked at.
    """
    from hydra._internal import defaults_list

    make = defaults_list._create_interpolation_map

    def make_where_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        needed = any(default.is_interpolation() for default in defaults)
        return make(overrides, defaults, self_added) if needed else None

    defaults_list._create_interpolation_map = make_where_needed


@cache
def _register_search_path_plugin() -> None:
    """Let Hydra ask for the folders of `_config_dirs` whenever it builds its search path.

    hydra.searchpath, the other way, looks for the primary config in one folder only and puts the rest behind it, so that a folder
    could add files but not shadow any.
    """
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class ConfigDirs(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in reversed(_config_dirs.get()):
                search_path.prepend(provider="config-dir", path=f"file://{folder}")

    Plugins.instance().register(ConfigDirs)


def _nearest(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _explain_hydra(error: Exception, overrides: Sequence[str], config_dirs: list[Path]) -> str:
    """Hydra's message, shortened to what the user wrote, with known and nearest choices."""
    text = str(error).strip()
    if missing := re.search(r"(?:In '([^']+)': )?Could not find '([^']+)'", text):
        group, _, name = missing[2].partition("/")
        known = known_options(group, config_dirs)
        where = f" (named in {missing[1]})" if missing[1] else ""
        if not known:
            return f"{group}: no such group{where}; groups are the folders of the recipes tree and of each --config-dir"
        return f"{group}: no '{name}'{where}; known: {', '.join(known)}{_nearest(name, known)}"
    if unknown := re.match(r"(?:In '([^']+)': )?Could not (override|delete) '([^']+)'", text):
        key = unknown[3].partition("=")[0]
        where = f" (in {unknown[1]})" if unknown[1] else ""
        siblings = _known_keys(key, overrides, config_dirs)
        if unknown[2] == "override" and key.rpartition(".")[2] in siblings:
            return f"{key}{where}: the value names keys that are not there yet; add them one by one: +{key}.NAME=..."
        known = f"; known there: {', '.join(siblings)}{_nearest(key.rpartition('.')[2], siblings)}" if siblings else ""
        added = f"; one that the recipe may have and leaves out is added by +{key}=..." if unknown[2] == "override" else ""
        return f"{key}: no such key to {unknown[2]}{where}{known}{added}; a value of your own goes under +extra.NAME"
    if "Error resolving interpolation" in text:
        return (
            f"{text.splitlines()[-1]}; in a curriculum's defaults, list phases before /model and /precision, and a new phase before "
            "the curriculum that it extends; a phase added on the command line needs parallel@phase.NAME.parallel=LAYOUT and "
            "precision@phase.NAME.precision=NAME"
        )
    if cause := error.__cause__:
        text = f"{text}: {str(cause).splitlines()[0]}"
    return re.sub(r"\s*See https://\S+ for .*", "", text).replace("\n", "; ")


def _known_keys(key: str, overrides: Sequence[str], config_dirs: list[Path]) -> list[str]:
    """Keys beside the unknown `key`, from the recipe without that override; none if it does not compose either."""
    from omegaconf import DictConfig, OmegaConf

    rest = [o for o in overrides if o.lstrip("+~").partition("=")[0] != key]
    if len(rest) == len(overrides):
        return []
    try:
        with _composed(rest, config_dirs) as config:
            parent_key = key.rpartition(".")[0]
            parent = OmegaConf.select(config, parent_key) if parent_key else config
            return sorted(map(str, parent)) if isinstance(parent, DictConfig) else []
    except RecipeError:
        return []  # a second fault: it is reported once this one is mended


def _check_stages(raw: dict[str, Any]) -> None:
    stages = raw.get("stages")
    if not isinstance(stages, list):
        raise RecipeError(
            f"stages: must be a list of stage names (got {stages!r}); a curriculum sets it, e.g. curriculum=five_phase"
        )
    known = [*raw["phase"], *raw["merge"], *raw["sft"], *raw["grpo"], *raw["ab"], *raw["export"]]
    unknown = [s for s in stages if s not in known]
    if unknown:
        kept = ",".join(str(s) for s in stages if s in known)
        raise RecipeError(
            f"stages: names {', '.join(map(str, unknown))}, which no phase, merge, sft or export defines; defined: {', '.join(known)}; "
            f"without it: stages=[{kept}]"
        )


def _resolve_tokens(key: str, phase: Any) -> list[str]:
    """Make `tokens` and `steps` of one phase agree, in place; returns what is wrong."""
    if not isinstance(phase, dict):
        return [f"{key}: must be a mapping (got {phase!r}); remove it with {key}=null"]
    problems, numbers = [], {}
    for name in ("tokens", "steps", "global_batch_samples", "seq_length_tokens"):
        value = phase.get(name)
        if value is None and name in ("tokens", "steps"):
            numbers[name] = None
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"{key}.{name}: must be a number (got {value!r})")
        elif value != int(value):
            problems.append(f"{key}.{name}: must be a whole number (got {value!r}); nearest: {round(value)}")
        elif value < 1:
            problems.append(f"{key}.{name}: must be positive (got {value!r})")
        else:
            numbers[name] = int(value)
    if problems:
        return problems
    tokens_per_step = numbers["global_batch_samples"] * numbers["seq_length_tokens"]
    if numbers["tokens"] is None and numbers["steps"] is None:
        return [f"{key}.tokens: neither tokens nor steps is given; set one, e.g. {key}.tokens={100 * tokens_per_step}"]
    if numbers["steps"] is None:
        phase["tokens_requested"] = numbers["tokens"]
        numbers["steps"] = -(-numbers["tokens"] // tokens_per_step)
        numbers["tokens"] = numbers["steps"] * tokens_per_step
    elif numbers["tokens"] is None:
        numbers["tokens"] = numbers["steps"] * tokens_per_step
    phase.update(numbers)
    return []
