"""What can go wrong in `cost_models`. A message says what is wrong, what was got, the way out."""


class CostModelError(ValueError):
    """Base of every error of this package; raised itself for a bad argument of a cost function."""


class UnknownHardwareError(CostModelError):
    """A device, link or data type that the package has no numbers for."""


class HardwareError(CostModelError):
    """A device or link whose constants are missing, of the wrong type or out of range."""


class ClusterError(CostModelError):
    """A cluster text, file or value that does not describe a machine."""


class ProfileError(CostModelError):
    """A profile that cannot be read, or that does not fit the cluster that it is applied to."""
