"""Input side: numpy in, `Batch` out. Nothing here imports a model or touches a device."""
