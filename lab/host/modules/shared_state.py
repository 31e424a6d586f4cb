"""Stands in for `modules.shared_state`: what is being generated, how far it is, and whether it is to stop."""

from __future__ import annotations

import datetime
import threading
import time


class State:
    """Where the current job is. Previews of unfinished pictures are left out."""

    def __init__(self):
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job = ""
        self.job_no = self.job_count = 0
        self.processing_has_refined_job_count = False
        self.job_timestamp = "0"
        self.sampling_step = self.sampling_steps = 0
        self.current_latent = self.current_image = self.textinfo = None
        self.time_start = self.server_start = time.time()
        self._command: str | None = None
        self._command_given = threading.Event()

    @property
    def server_command(self) -> str | None:
        """What the server shall do next: "stop" or "restart"."""
        return self._command

    @server_command.setter
    def server_command(self, value: str | None) -> None:
        self._command = value
        self._command_given.set()

    def wait_for_server_command(self, timeout: float | None = None) -> str | None:
        """Waits for a command and takes it."""
        if not self._command_given.wait(timeout):
            return None
        self._command_given.clear()
        command, self._command = self._command, None
        return command

    def request_restart(self) -> None:
        """Asks for Reload UI."""
        self.interrupt()
        self.server_command = "restart"

    def skip(self) -> None:
        """Stops this batch; the next one begins."""
        self.skipped = True

    def interrupt(self) -> None:
        """Stops the whole generation at the next denoiser call."""
        self.interrupted = True

    def stop_generating(self) -> None:
        """Lets this batch end and begins no other."""
        self.stopping_generation = True

    def nextjob(self) -> None:
        """A pass or a batch is done."""
        self.job_no += 1
        self.sampling_step = 0

    def dict(self) -> dict:
        """The state as the API shows it."""
        names = (
            "skipped interrupted stopping_generation job job_count job_timestamp job_no sampling_step sampling_steps"
        )
        return {name: getattr(self, name) for name in names.split()}

    def begin(self, job: str = "(unknown)") -> None:
        """Begins a job: everything is set back."""
        self.time_start = time.time()
        self.job, self.job_no, self.job_count, self.sampling_step = job, 0, -1, 0
        self.processing_has_refined_job_count = False
        self.job_timestamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
        self.current_latent = self.current_image = self.textinfo = None
        self.skipped = self.interrupted = self.stopping_generation = False

    def end(self) -> None:
        """Ends a job."""
        self.job, self.job_count = "", 0
