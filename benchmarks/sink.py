"""Where the records of a run that can be continued go: a file, or a folder with a file for each workload."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from . import records
from .records import CaseResult, Run


class Sink:
    """Appends every case when it is done. A path that is a folder, or ends as one, gets a file for each workload."""

    def __init__(self, path: str) -> None:
        """Raises OSError where nothing can be written."""
        self.path = Path(path)
        self.folder = self.path.is_dir() or path.endswith(("/", os.sep))
        if self.folder:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".part"
            probe.touch()
            probe.unlink()
        else:
            with self.path.open("a", encoding="utf-8"):
                pass

    def earlier(self) -> Run | None:
        """The run to continue; None where there is none yet."""
        if self.folder:
            return records.read_all(self.path) if any(self.path.glob("*.jsonl")) else None
        return records.read(self.path) if self.path.stat().st_size else None

    def start(self, run: Run) -> None:
        """Write what is there already, without what a killed run left half written."""
        if not self.folder:
            records.rewrite(self.path, run)
            return
        for name in {case.workload for case in run.cases}:
            cases = [case for case in run.cases if case.workload == name]
            records.rewrite(self._file(name), replace(run, cases=cases))

    def add(self, run: Run, case: CaseResult) -> None:
        """Append a case of the run."""
        file = self._file(case.workload) if self.folder else self.path
        if not file.exists():
            records.rewrite(file, replace(run, cases=[]))
        with file.open("a", encoding="utf-8") as stream:
            records.write_case(stream, case)

    def _file(self, workload: str) -> Path:
        return self.path / f"{workload}.jsonl"
