"""What is trained. A method is a module of three names; adding one is one file and one line here.

OUTPUT_FOLDER                      name of the folder that it leaves beside its checkpoints
apply(model, train) -> model       freeze, wrap, switch on what is trained
save(model, folder, config) -> None   the trained weights, in a format that plain libraries load
"""

from types import ModuleType

from trainer.methods import full, lora

METHODS: dict[str, ModuleType] = {"lora": lora, "full": full}
