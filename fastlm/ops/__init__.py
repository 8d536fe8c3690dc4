"""The ops: what each computes, its gradients derived by hand, and a public function of the same name.

Every file here is one op; every name in its `__all__` is public as ``fastlm.ops.<name>``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

# The function ``fastlm.ops.layer_norm`` takes the place of the submodule of that name.
for _module in [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]:
    globals().update({name: getattr(_module, name) for name in _module.__all__})


def __getattr__(name: str) -> Any:
    from ..registry import ops

    raise AttributeError(f"fastlm.ops has no {name!r}; the ops are {', '.join(ops())}")
