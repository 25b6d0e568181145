"""Do all processes start alike? Compared by hash before the first step, because nothing later would show a difference.

Of the features these are the hashes in the manifest (of file names and labels in the official layout), not those of the bytes
on each machine's disk, which `python -m data.features --verify` reads.
"""

import hashlib
import json
import socket

from accelerate import Accelerator
from accelerate.utils import gather_object

from config import Config, UserError, to_dict
from data.autoencoder import hash_weights


def check_agreement(accelerator: Accelerator, config: Config, store, step: int, *models) -> None:
    """UserError on every process where one differs from the first in configuration, features, step or weights. Collective."""
    if accelerator.num_processes == 1:
        return
    configuration = hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()
    facts = {"configuration": configuration, "features": store.fingerprint(), "step": step}
    facts["weights"] = [hash_weights(model) for model in models]
    everyone = gather_object([(socket.gethostname(), facts)])
    first_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        if odd := [name for name in expected if found[name] != expected[name]]:
            raise UserError(
                f"process {rank} on {host} differs from process 0 on {first_host} in {', '.join(odd)}; all machines need the "
                "same features and configuration, and the run's folder on a file system that they share"
            )
