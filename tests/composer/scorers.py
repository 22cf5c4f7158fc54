"""A Python scorer that does what the answer tells it to, installed as pip would install it."""

from pathlib import Path

_MODULE = """
import os, signal, sys, time
from pathlib import Path

class Obedient:
    def __init__(self, marker, does=""):
        self.does, self.marker = does, marker
        if not marker:
            raise RuntimeError("no marker")
        Path(marker).write_text(str(os.getpid()))

    def __call__(self, answer, example):
        answer = self.does or answer
        if answer == "raises":
            raise RuntimeError("no database")
        if answer == "tells":
            Path(self.marker).write_text(chr(10).join(os.environ))
            return 1.0
        if answer == "leaves":
            sys.exit(3)
        if answer == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if answer == "returns None":
            return None
        if answer == "sleeps":
            time.sleep(3600)
        while answer == "loops":
            pass
        print("not a reply")
        return answer in example.choices or answer == example.completion
"""


def install_scorer(site: Path) -> None:
    """Installs the scorer `obedient` into a directory, which must be on the path."""
    metadata = site / "obedient-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: obedient\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[adaptory.scorers]\nobedient = obedient:Obedient\n")
    (site / "obedient.py").write_text(_MODULE)
