"""Where it is trained: how a model is laid over devices. Adding a strategy is one file and one line here.

place(model, device) -> model
"""

from types import ModuleType

from trainer.strategies import single

STRATEGIES: dict[str, ModuleType] = {"single": single}
