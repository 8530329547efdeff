"""What Prefect does by itself for our deployments: a run whose processes are all gone is marked Crashed.

A worker tells of a flow that died, but nobody tells of a flow that died together with its worker (a machine that
was switched off, one out-of-memory kill too many): without this rule it is Running for ever. The runs of our
deployments send a heartbeat every 30 seconds (prefect.yaml sets it), and this rule listens for it.
"""

from datetime import timedelta

from prefect.automations import (
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType

ZOMBIE_RULE = "sft-pipeline: crash runs without heartbeat"
TAG = "sft-pipeline"
"""Every deployment of prefect.yaml has it, and so have their runs: those of others are not ours to mark."""
SILENCE_SECONDS = 90.0
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed")


def zombie_rule(silence_seconds: float) -> AutomationCore:
    """After a heartbeat there must come another one or the end of the run; else it is Crashed."""
    return AutomationCore(
        name=ZOMBIE_RULE,
        description=f"No heartbeat for {silence_seconds:g} s: flow and worker are gone, the run is Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
            ),
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No heartbeat for {silence_seconds:g} s: the flow and its worker are gone. Run again: "
                "finished parts are kept.",
            )
        ],
    )


def create_rules(client: SyncPrefectClient, *, silence_seconds: float = SILENCE_SECONDS) -> None:
    """Create the rule, or bring an older one up to date; one that was switched off stays off."""
    rule = zombie_rule(silence_seconds)
    found = client.read_automations_by_name(ZOMBIE_RULE)
    if not found:
        client.create_automation(rule)
    for existing in found:
        client.update_automation(existing.id, rule.model_copy(update={"enabled": existing.enabled}))


def delete_rules(client: SyncPrefectClient) -> int:
    """Remove the rule; returns how many there were."""
    found = client.read_automations_by_name(ZOMBIE_RULE)
    for existing in found:
        client.delete_automation(existing.id)
    return len(found)
