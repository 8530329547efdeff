"""The flow `sft-pipeline`: raw dumps in, a gated model out. One line a stage, from top to bottom.

No `from __future__ import annotations` in flow modules: served flows then fail with undefined references.
"""

from prefect import flow

from flows.cancelling import stop_training
from flows.flow_run import open_flow_run
from flows.parameters import ConfigPath, Overrides
from flows.tasks import (
    clean,
    dedup,
    evaluate,
    filter_rows,
    holdout,
    merge,
    pack,
    promote,
    split,
    train,
)


@flow(
    name="sft-pipeline",
    retries=0,
    persist_result=False,
    on_cancellation=[stop_training],
    on_crashed=[stop_training],
)
def sft_pipeline(
    config_path: ConfigPath = "configs/demo.yaml",
    overrides: Overrides = None,
    from_stage: str | None = None,
    until: str | None = None,
) -> None:
    """Turn the sources of a config into a fine-tuned model, and promote it if it is the better one.

    `overrides` are {"train.max_steps": 5} or ["train.max_steps=5"]; a stage whose inputs are what they were
    is skipped; `from_stage` and `until` cut the story short.
    """
    with open_flow_run(config_path, overrides, first=from_stage, last=until) as run:
        merge(run)  #        every dump, one shape: 01_merged
        clean(run)  #        HTML to Markdown, Unicode: 02_cleaned
        filter_rows(run)  #  language, quality, size: 03_filtered
        dedup(run)  #        exact, branches, near: 04_deduplicated
        holdout(run)  #      train, validation, test: 05_held_out
        split(run)  #        rendered, encoded, cut at turns: 06_shards
        pack(run)  #         which examples share a bin: 07_plan
        train(run)  #        a child process: checkpoints/
        evaluate(run)  #     on the held-out side: evaluation.json
        promote(run)  #      only a better model: promoted.json
