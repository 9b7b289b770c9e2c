"""Which sample is seen when, and how samples become batches on the device."""
