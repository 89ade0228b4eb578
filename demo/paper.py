"""Measures the claims of the paper on a laptop: small models of Fashion-MNIST, two seeds of each.

    python demo/paper.py --list         names all work with its minutes on one core, and what is done
    python demo/paper.py --all          does what has no result yet; two such processes share the work
    python demo/paper.py --only a       the same, only for row a of the table, or for one name of --list
    python demo/paper.py --table        writes the results as a table into docs/paper.md

Each training or measurement writes docs/results/paper/NAME.json at its end; to repeat it, delete that file
and the folder output/paper/NAME. A second call goes on where a training was stopped. What fails does not stop
the rest; it is named at the end, and the exit status is 1.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import sys
import time
import traceback
from collections.abc import Iterable, Sequence

import paper_table as results
import paper_work as work
import torch
from common import make_parser
from paper_work import Job

from util.errors import UserError
from util.files import try_lock, write_json
from util.flags import provenance
from util.threads import cpu_name, num_threads

WAIT = 20.0  # seconds between two looks at what another process does


def with_needs(names: Iterable[str], jobs: dict[str, Job]) -> list[str]:
    """The names, and all that they need, in the order of `jobs`."""
    wanted, left = set(), list(names)
    while left:
        if (name := left.pop()) not in wanted:
            wanted.add(name)
            left += jobs[name].needs
    return [name for name in jobs if name in wanted]


def choose(only: str, jobs: dict[str, Job]) -> list[str]:
    """The jobs of `--only`: of a row of the table, or one by name. Raises UserError where there is none."""
    of_row = [name for line in results.lines() if line.row == only for name in line.names]
    if not of_row and only not in jobs:
        raise UserError(f"--only {only}: no row of the table and no name of --list")
    return with_needs(of_row or [only], jobs)


def run(name: str, job: Job) -> None:
    """Does a job and writes its result."""
    print(f"== {name}, about {job.minutes:.0f} minutes of one core", flush=True)
    began, used = time.perf_counter(), time.process_time()
    content = {"command": f"python demo/paper.py --only {name}", "result": job.work()}
    content["seconds"] = round(time.perf_counter() - began, 1)
    content["cpu_seconds"] = round(time.process_time() - used, 1)
    content |= {"threads": torch.get_num_threads(), "processor": cpu_name()}
    about = provenance(argparse.Namespace())
    content |= {key: about[key] for key in ("commit", "versions")}
    write_json(results.RESULTS / f"{name}.json", content)


def run_all(names: Sequence[str], jobs: dict[str, Job]) -> dict[str, str]:
    """Does all jobs that have no result, except those that another process does, and waits for these.

    Returns what failed, and why.
    """
    failed = {}
    while left := [name for name in names if not results.is_done(name) and name not in failed]:
        worked = False
        for name in left:
            if missing := [need for need in jobs[name].needs if need in failed]:
                failed[name], worked = f"needs {missing[0]}", True
            if name in failed or not all(map(results.is_done, jobs[name].needs)):
                continue
            lock, _ = try_lock(work.OUTPUT / f"{name}.lock", {})
            if lock is None:
                continue
            worked = True
            with lock:
                try:
                    if not results.is_done(name):
                        run(name, jobs[name])
                except (Exception, SystemExit) as error:
                    if isinstance(error, SystemExit) and error.code == 130:  # Ctrl-C
                        raise
                    traceback.print_exc()
                    failed[name] = f"{type(error).__name__}: {error}"
        if not worked:
            time.sleep(WAIT)
    return failed


def main() -> None:
    parser = make_parser("paper.py", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="do all that has no result yet")
    what.add_argument("--only", metavar="ROW", help="do this: a letter of the table, or a name of --list")
    what.add_argument("--list", action="store_true", help="name all work")
    what.add_argument("--table", action="store_true", help="write the results into docs/paper.md")
    args = parser.parse_args()
    jobs, failed = work.jobs(), {}
    with parser.one_line_errors(), num_threads(1):
        if args.table:
            results.write_table()
        elif args.list:
            for name, job in jobs.items():
                rows = sorted({line.row for line in results.lines() if name in line.names})
                state = "done" if results.is_done(name) else f"{job.minutes:.0f} min"
                print(f"{state:>6}  {name:34}{''.join(rows)}")
            left = sum(job.minutes for name, job in jobs.items() if not results.is_done(name))
            print(f"{left / 60:.1f} hours of one core are left")
        else:
            for folder in (results.RESULTS, work.OUTPUT):
                folder.mkdir(parents=True, exist_ok=True)
            failed = run_all(list(jobs) if args.all else choose(args.only, jobs), jobs)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
