"""What is trained. A method is a module of four names; adding one is one file and one line here.

OUTPUT_FOLDER                       name of the folder that it leaves beside its checkpoints
apply(model, train) -> model        freeze, wrap, switch on what is trained
saved_names(model) -> names         of the parameters that save() wants, the same on all ranks
save(model, folder, config, weights) -> None   the trained weights, in a format that plain libraries load;
                                    `weights` yields those parameters by name, each whole and on the CPU

and may have:

NEEDS_WEIGHTS                       True: apply reads the model's weights, so under a strategy that reads them in parts
                                    each process loads the whole model first
check(model, train) -> None         of a model on the meta device: do names and shapes have what the settings ask for
"""

from types import ModuleType

from trainer.methods import (
    expand,
    freeze,
    full,
    ia3,
    llama_adapter,
    lora,
    p_tuning,
    prefix,
    prompt,
)

METHODS: dict[str, ModuleType] = {
    "lora": lora,
    "full": full,
    "freeze": freeze,
    "expand": expand,
    "prefix": prefix,
    "prompt": prompt,
    "p_tuning": p_tuning,
    "llama_adapter": llama_adapter,
    "ia3": ia3,
}
