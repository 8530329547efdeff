"""What is trained. A method is a module of four names; adding one is one file and one line here.

OUTPUT_FOLDER                       name of the folder that it leaves beside its checkpoints
apply(model, train) -> model        freeze, wrap, switch on what is trained
saved_names(model) -> names         of the parameters that save() wants, the same on all ranks
save(model, folder, config, weights) -> None   the trained weights, in a format that plain libraries load;
                                    `weights` yields those parameters by name, each whole and on the CPU

and, where there is something to be refused before weights are read:

check(model, train) -> None         of a model on the meta device: do names and shapes have what the settings ask for
"""

from types import ModuleType

from trainer.methods import full, ia3, lora

METHODS: dict[str, ModuleType] = {"lora": lora, "full": full, "ia3": ia3}
