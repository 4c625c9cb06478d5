"""vhost-user: the protocol by which a virtual machine monitor hands a virtio device to another process."""
