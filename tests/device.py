"""The device for tests of tensor code: the CPU, or the one of `pytest --device`."""

import os

from tests import second_device

ENVIRONMENT = "ADAPTORY_TEST_DEVICE"
DEVICE = os.environ.get(ENVIRONMENT, "cpu")
if DEVICE == second_device.NAME:
    second_device.register()
