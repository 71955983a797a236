"""saebench: harvest activations, train sparse autoencoders, look at their features, test what they do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from saebench.core.deprecation import MovedModules

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache, open_cache
    from saebench.activations.harvest import harvest
    from saebench.activations.importing import import_activations
    from saebench.activations.module_source import ModuleSource
    from saebench.analysis import figures
    from saebench.analysis.absorption import absorbed
    from saebench.analysis.attribution import Attribution, logit_attribution
    from saebench.analysis.crosscoders import crosscoder_sites
    from saebench.analysis.effect_columns import index_effects
    from saebench.analysis.effects import LossEffects, loss_effects
    from saebench.analysis.geometry import Redundancy, clusters, decoder_map, redundancy
    from saebench.analysis.interventions import Steering, ablate, steer
    from saebench.analysis.matching import Matching, match, splits
    from saebench.analysis.prompts import compare_prompts, features_of
    from saebench.core.codes import SparseCodes
    from saebench.core.errors import UserError
    from saebench.evaluation import EvalReport, evaluate
    from saebench.evaluation.compare import compare
    from saebench.explaining import explain
    from saebench.formats import export_sae, import_sae
    from saebench.runs.run import load
    from saebench.saes.base import SAE
    from saebench.sources.models import load_model
    from saebench.store import export_store, index, open_store
    from saebench.store.query import FeatureStore
    from saebench.training import sweep, train

__version__ = "0.2.0"

_HOMES = {
    "ActivationCache": "saebench.activations.cache",
    "Attribution": "saebench.analysis.attribution",
    "EvalReport": "saebench.evaluation",
    "FeatureStore": "saebench.store.query",
    "LossEffects": "saebench.analysis.effects",
    "Matching": "saebench.analysis.matching",
    "ModuleSource": "saebench.activations.module_source",
    "Redundancy": "saebench.analysis.geometry",
    "SAE": "saebench.saes.base",
    "SparseCodes": "saebench.core.codes",
    "Steering": "saebench.analysis.interventions",
    "UserError": "saebench.core.errors",
    "ablate": "saebench.analysis.interventions",
    "absorbed": "saebench.analysis.absorption",
    "clusters": "saebench.analysis.geometry",
    "compare": "saebench.evaluation.compare",
    "compare_prompts": "saebench.analysis.prompts",
    "crosscoder_sites": "saebench.analysis.crosscoders",
    "decoder_map": "saebench.analysis.geometry",
    "evaluate": "saebench.evaluation",
    "explain": "saebench.explaining",
    "export_sae": "saebench.formats",
    "export_store": "saebench.store",
    "features_of": "saebench.analysis.prompts",
    "figures": "saebench.analysis.figures",
    "harvest": "saebench.activations.harvest",
    "import_activations": "saebench.activations.importing",
    "import_sae": "saebench.formats",
    "index": "saebench.store",
    "index_effects": "saebench.analysis.effect_columns",
    "load": "saebench.runs.run",
    "load_model": "saebench.sources.models",
    "logit_attribution": "saebench.analysis.attribution",
    "loss_effects": "saebench.analysis.effects",
    "match": "saebench.analysis.matching",
    "open_cache": "saebench.activations.cache",
    "open_store": "saebench.store",
    "redundancy": "saebench.analysis.geometry",
    "splits": "saebench.analysis.matching",
    "steer": "saebench.analysis.interventions",
    "sweep": "saebench.training",
    "train": "saebench.training",
}

_MODULES = {"figures"}
"""Names that are a module, not something in one."""

__all__ = [  # noqa: RUF022
    "ActivationCache",
    "Attribution",
    "EvalReport",
    "FeatureStore",
    "LossEffects",
    "Matching",
    "ModuleSource",
    "Redundancy",
    "SAE",
    "SparseCodes",
    "Steering",
    "UserError",
    "__version__",
    "ablate",
    "absorbed",
    "clusters",
    "compare",
    "compare_prompts",
    "crosscoder_sites",
    "decoder_map",
    "evaluate",
    "explain",
    "export_sae",
    "export_store",
    "features_of",
    "figures",
    "harvest",
    "import_activations",
    "import_sae",
    "index",
    "index_effects",
    "load",
    "load_model",
    "logit_attribution",
    "loss_effects",
    "match",
    "open_cache",
    "open_store",
    "redundancy",
    "splits",
    "steer",
    "sweep",
    "train",
]


sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: ``import saebench`` itself costs nothing."""
    if name not in _HOMES:
        place = f"saebench.{name}"
        # `import saebench` of version 0.1 had loaded its modules, so scripts use saebench.config as it is.
        if not name.startswith("_") and importlib.util.find_spec(place) is not None:
            return importlib.import_module(place)
        raise AttributeError(f"module 'saebench' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
