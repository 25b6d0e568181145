"""Whether all processes start alike. They compare before the first step: nothing later shows a difference."""

import socket
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from config import UserError


def check_agreement(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Compare what every process knows with what the first one knows. Collective.

    Args:
        facts: name -> plain data, such as a hash.

    Raises:
        UserError: on every process, naming the process and the facts that differ.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([(socket.gethostname(), facts)])
    first_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        different = [name for name in expected if found[name] != expected[name]]
        if different:
            raise UserError(
                f"process {rank} on {host} differs from process 0 on {first_host} in {', '.join(different)}; "
                "all machines need the same features and configuration, and the run's folder on a file "
                "system that they share"
            )
