"""Memory in use on the whole GPU while something runs, as nvidia-smi shows it: the same measure for everybody."""

import importlib.util
import os
import threading
from types import TracebackType

SECONDS_BETWEEN_LOOKS = 0.1


class GpuMemory:
    """A context: `peak_gib` is the most that was in use inside; None where there is no GPU or no nvidia-ml-py."""

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "GpuMemory":
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        if importlib.util.find_spec("pynvml") is None:
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(visible_gpu())
            while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
                used = pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30
                self.peak_gib = max(self.peak_gib or 0.0, used)
        except pynvml.NVMLError:
            return


def visible_gpu() -> int:
    """Number of the GPU that torch calls the first one, where CUDA_VISIBLE_DEVICES holds numbers."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdigit() else 0
