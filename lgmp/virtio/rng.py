"""What a virtio entropy device and its driver agree on (virtio 1.0, section 5.4): one queue of buffers to fill."""

from __future__ import annotations

from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC

REQUEST_QUEUE = 0
QUEUES = 1


def features() -> int:
    """The feature bits an entropy device offers: indirect descriptors alone."""
    return 1 << VIRTIO_RING_F_INDIRECT_DESC
