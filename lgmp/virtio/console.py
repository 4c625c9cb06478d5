"""What a virtio console and its driver agree on (virtio 1.0, section 5.3): two queues, no features, no config space."""

INPUT_QUEUE = 0
OUTPUT_QUEUE = 1
QUEUES = 2


def features() -> int:
    """The feature bits a console offers: none, as every lguest launcher."""
    return 0
