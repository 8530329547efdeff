"""What `sft-pipeline undeploy` removes from a Prefect server: deployments with their planned runs, pool, rule.

The records of past runs stay, and no run root is touched.
"""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from flows.automations import TAG, delete_rules


def remove_all(client: SyncPrefectClient, pool: str) -> list[str]:
    """Remove everything of ours; returns it in words. A pool that has deployments of others stays."""
    deployments = _deployments(client, pool)
    ours = [deployment for deployment in deployments if TAG in deployment.tags]
    for deployment in ours:
        client.delete_deployment(deployment.id)
    num_rules = delete_rules(client)
    removed = [f"{len(ours)} deployments"] if ours else []
    removed += [f"{num_rules} automation"] if num_rules else []
    if len(ours) == len(deployments) and _delete_pool(client, pool):
        removed.append(f"work pool {pool}")
    return removed


def _deployments(client: SyncPrefectClient, pool: str) -> list[DeploymentResponse]:
    return client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])))


def _delete_pool(client: SyncPrefectClient, pool: str) -> bool:
    try:
        client.delete_work_pool(pool)
    except ObjectNotFound:
        return False
    return True
