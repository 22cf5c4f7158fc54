"""Where tests of tensor code compute: on the CPU, or as `pytest --device` says."""

import os

from tests import second_device

ENVIRONMENT = "ADAPTORY_TEST_DEVICE"
DEVICE = os.environ.get(ENVIRONMENT, "cpu")
if DEVICE == second_device.NAME:
    second_device.register()
