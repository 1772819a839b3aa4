"""The class of a base, built from its configuration on the meta device: names, types and ties without a single weight.

Only classes of transformers itself are built; nothing is fetched and no remote code runs.  A configuration that would
fetch, or that counts more layers than the base has tensors, is not built: it may be anybody's.  Imports torch and
transformers when it is asked to build, and answers None where they are not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from lorahub.deltas.kind import JSON

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FETCHING", "build", "harmless"]

FETCHING = frozenset({"use_pretrained_backbone"})
"""Settings with which a class would fetch weights while it is built."""

_COUNTS = ("layers", "blocks", "depth", "depths", "stages", "n_layer")
"""How settings end that say how many modules there are."""

_FEW = 256
"""Nobody has to have that many tensors."""

_EXPERTS, _MOST_EXPERTS = "experts", 1 << 16
"""The same of experts, which one tensor may hold all of."""


def build(config: Mapping[str, JSON], stored: Collection[str]) -> nn.Module | None:
    """The model that ``config.json`` describes, on the meta device; None where it is not to be had here.

    Args:
        config: as parsed.
        stored: names of the base's tensors; a configuration that counts more layers than that is not built.
    """
    if not harmless(config, len(stored)):
        return None
    try:
        torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "transformers"}:
            raise
        return None
    chosen = _class(transformers, config)
    if chosen is None:
        return None
    with _quietly(transformers):
        try:
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_plain(dict(config)))
            with torch.device("meta"):
                model = chosen(settings)
        except Exception:  # noqa: BLE001 - a constructor may raise anything at settings of another release
            return None
    return cast("nn.Module", model.eval())


def harmless(config: Mapping[str, JSON], most: int) -> bool:
    """Whether building from a configuration fetches nothing and takes no more than its tensors warrant."""
    if config.get("backbone") and not config.get("backbone_config") and config.get("model_type") != "timm_backbone":
        return False  # it would be looked up on a hub
    for key, value in config.items():
        if key in FETCHING and value:
            return False
        if isinstance(value, Mapping) and not harmless(cast("Mapping[str, JSON]", value), most):
            return False
        allowed = max(most, _FEW) if key.endswith(_COUNTS) else _MOST_EXPERTS if key.endswith(_EXPERTS) else None
        numbers = value if isinstance(value, list) else [value]
        if allowed is not None and any(isinstance(each, int) and each > allowed for each in numbers):
            return False
    return True


def _plain(value: JSON) -> Any:
    """A setting as it was before transformers wrote it: JSON has no infinity."""
    if isinstance(value, Mapping):
        return (
            float(str(value["__float__"]))
            if value.keys() == {"__float__"}
            else {k: _plain(v) for k, v in value.items()}
        )
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _class(transformers: Any, config: Mapping[str, JSON]) -> Any:
    """The class that ``architectures`` names, or the bare model of the architecture; None where there is none."""
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    settings = transformers.CONFIG_MAPPING[kind]
    for name in names if isinstance(names, list) else []:
        found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found if cast("Any", found).config_class is settings or name in _known(kind) else None
    if names:  # a class of remote code, or of another release
        return None
    with _quietly(transformers):
        found = transformers.MODEL_MAPPING.get(settings, None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _known(kind: str) -> set[str]:
    """Names of the classes that transformers has for an architecture, some of which are another architecture's."""
    auto: Any = import_module("transformers.models.auto.modeling_auto")
    named = (each[kind] for name, each in vars(auto).items() if name.endswith("_MAPPING_NAMES") and kind in each)
    return {name for each in named for name in ([each] if isinstance(each, str) else each)}


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without what a constructor has to say of settings."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
