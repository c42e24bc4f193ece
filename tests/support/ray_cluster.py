"""A Ray cluster of two nodes on this machine, in a process of its own: `python -m tests.support.ray_cluster`.

It writes its address, and ends when its input does.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

MEMORY = 100 * 2**20  # bytes of a node's object store: nothing large is sent


def main() -> None:
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
