"""What a node works with: the configuration that the server sent, its clients' images and shards, the teacher's logits on them, and the task.

What a node may refuse, and all that a server can hear of its troubles, is in :data:`SAYS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm_fl.engines.reception import OWN, PARTITION, clients_of
from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.algorithms.base import Shard, Task
    from mllm_fl.config import Config
    from mllm_fl.data.images import ImageSet
    from mllm_fl.deployment.home import Home

SAYS = {  # all that a server can hear of a node's troubles
    "images": "it has no images of its own (data in its node.toml), and this federation asks for them",
    "labels": "its class names are not the server's",
    "no-data": "its images cannot be read (its log says why)",
    "partition": "it is not told which part of the data set it plays (partition-id, num-partitions)",
    "not-mine": "it was asked for a client that it does not play",
    "version": "it runs another version of mllm-fl",
    "config": "it cannot use the configuration (its log says why)",
    "message": "it cannot read the message",
    "failed": "its training stopped (its log says why)",
}


class Refusal(Exception):
    """Why a message is not answered: a code of :data:`SAYS`, and what else the server may hear."""

    def __init__(self, code: str, more: str = "") -> None:
        super().__init__(code)
        self.code, self.more = code, more

    @property
    def say(self) -> str:
        """The sentence that the server hears."""
        return SAYS[self.code] + (f": {self.more}" if self.more else "")


def config_of(home: Home, facts: Mapping[str, Any]) -> Config:
    """The server's configuration, with this machine's place of the data set."""
    from mllm_fl.config import from_dict
    from mllm_fl.toml import set_dotted

    raw = dict(facts["config"])
    if home.root is not None:
        raw = json.loads(json.dumps(raw))
        set_dotted(raw, "data.root", home.root)
    return from_dict(raw, "the server's configuration")


def clients_here(home: Home, config: Config, facts: Mapping[str, Any]) -> Sequence[int]:
    """The clients that this node plays."""
    if facts["images"] == OWN:
        if home.data is None:
            raise Refusal("images")
        return [int(facts["client"])]
    if home.partition_id is None or home.num_partitions is None or not 0 <= home.partition_id < home.num_partitions:
        raise Refusal("partition")
    return clients_of(home.partition_id, home.num_partitions, config.data.clients)


def images_of(home: Home, config: Config, facts: Mapping[str, Any], client: int) -> ImageSet:
    """A client's training images.

    Raises:
        Refusal: they cannot be read, or their classes are not the server's; the log says more.
    """
    from mllm_fl.deployment.images import Mismatch, site_images
    from mllm_fl.stages.chain import federation_of

    try:
        if facts["images"] == PARTITION:
            return federation_of(config).client(client)
        assert home.data is not None
        names = [str(c) for c in facts["classes"]]
        return site_images(home.data, names, int(facts["size"]), facts["mean"], facts["std"])
    except Mismatch as e:
        home.log("labels", why=str(e))
        raise Refusal("labels", e.told) from e
    except UserError as e:
        home.log("images", why=str(e))
        raise Refusal("no-data") from e


def shard_of(home: Home, config: Config, facts: Mapping[str, Any], client: int) -> Shard:
    """What a client trains on in this round, with the teacher's logits where the method needs them.

    Raises:
        Refusal: this node does not play that client, or as :func:`images_of`.
    """
    from mllm_fl.algorithms.base import Shard

    if client not in clients_here(home, config, facts):
        raise Refusal("not-mine")
    images, teacher = images_of(home, config, facts, client), None
    if "teacher" in config.federate.method.needs:
        teacher = _logits(home, config, facts, client, images)
    return Shard(client, int(facts["round"]), images, int(facts["seed"]), teacher)


def _logits(home: Home, config: Config, facts: Mapping[str, Any], client: int, images: ImageSet) -> Any:
    """The frozen teacher's logits on this client's images, from this machine's own teacher, kept in its state folder."""
    from mllm_fl.models.teacher.clip import load_teacher
    from mllm_fl.models.teacher.logits import teacher_logits
    from mllm_fl.stages.chain import federation_of
    from mllm_fl.stages.server import clients_logits

    folder = home.state / "logits"
    if facts["images"] == PARTITION:  # the bits of a logit depend on its batch: as the simulator has them
        return clients_logits(config.teacher, federation_of(config), folder)[client]
    return teacher_logits(load_teacher(config.teacher), images, images.class_names, folder)


def task_of(home: Home, facts: Mapping[str, Any]) -> tuple[Config, Task]:
    """The configuration, and what is learned, as the server has it."""
    from mllm_fl.algorithms.base import Task
    from mllm_fl.models.network import build_network

    config, classes = config_of(home, facts), tuple(str(c) for c in facts["classes"])
    net = build_network(config.model, len(classes), config.seed)
    precision = config.federate.engine.precision
    return config, Task(
        net,
        classes,
        tuple(int(n) for n in facts["population"]),
        int(facts["seed"]),
        precision="bf16" if precision == "bf16" else "fp32",
        channels_last=config.federate.engine.layout == "channels_last",
    )
