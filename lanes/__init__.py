"""How trials share a device: engines that run many lanes, the probe that chooses one, the host that owns them."""
