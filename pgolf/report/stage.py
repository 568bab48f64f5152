"""The stage ``report``: print the table of results and write the page."""

from __future__ import annotations

from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.report.results import summary_table


def run_report(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Print the table of results and write the report."""
    if world.is_main:
        try:
            world.log(f"\n{summary_table(folder.summary())}\n")
            from pgolf.report.page import write_report  # the exported program lacks this module

            world.log(f"report: {write_report(folder.path)}")
        except ModuleNotFoundError:
            world.log(f"the report's page is not part of this program: pgolf report --run-dir {folder.path}")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            shown = f"{type(error).__name__}: {error}"
            raise FileError(f"{folder.summary_file} or {folder.metrics} is damaged or incomplete ({shown})") from error
    world.barrier()
