"""A network device in the process of the tests, on any link, and its driver."""

from __future__ import annotations

import select
from typing import Generic, TypeVar

from lgmp.closing import Closing
from lgmp.testing import PATIENCE, Driver, Recorder, Used
from lgmp.virtio.net import TRANSMIT_QUEUE
from workers.net import Net, Stream, Tap

Frame = TypeVar("Frame")


class NetworkCard(Closing, Generic[Frame]):
    """A network device, its driver, and what it said. What its driver makes of a frame is for each kind to say."""

    def __init__(self, link: Tap | Stream, driver: Driver, accepted: int) -> None:
        self.driver = driver
        self.recorder = Recorder()
        self.said: list[str] = []
        self.link = link
        self.net = Net(link, say=self.said.append)
        self.net.attach(driver.device_queues("eth0", indirect=False), self.recorder)
        self.net.accept(accepted)

    def received(self) -> list[Frame]:
        """The frames that the driver got since the last time."""
        raise NotImplementedError

    def sent(self) -> list[Used]:
        """The frames that were sent since the last time."""
        return self.driver.queues[TRANSMIT_QUEUE].collect()

    def wants(self, event: int) -> bool:
        """Whether it waits for this of its link (select.POLLIN, POLLOUT)."""
        return any(events & event for _, events in self.net.wants())

    def pump(self, count: int) -> list[Frame]:
        """Serve its descriptor until the driver has got `count` frames."""
        received = self.received()
        while len(received) < count:
            assert self.wants(select.POLLIN)
            poll = select.poll()
            poll.register(self.link.fd, select.POLLIN)
            assert poll.poll(PATIENCE * 1000), f"only {len(received)} frames came"
            self.net.ready(self.link.fd, select.POLLIN)
            received += self.received()
        return received

    def close(self) -> None:
        self.net.close()
        self.driver.close()
