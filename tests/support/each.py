"""Several commands of priorhole, each in a process of its own that is spared the imports: python each.py JSON

The argument holds pairs of a folder and a command. What is printed, as JSON: for each, its exit code, stdout and stderr.
"""

import gc
import json
import os
import runpy
import shlex
import sys


def main():
    outcomes = []
    for folder, command in json.loads(sys.argv[1]):
        streams = [os.memfd_create("stream") for _ in range(2)]  # which no disk can refuse
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            for number, stream in enumerate(streams, start=1):
                os.dup2(stream, number)
            sys.argv = ["priorhole", *shlex.split(command)]
            runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
            sys.exit()  # as any other process ends
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.append([code, *(os.pread(stream, os.fstat(stream).st_size, 0).decode() for stream in streams)])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    # What the commands import late, most of a command's time in a small folder.
    import mlflow  # noqa: F401
    import torch._dynamo  # noqa: F401

    import pipelines.cli
    import pipelines.evaluation
    import pipelines.report
    import pipelines.stages  # noqa: F401

    gc.freeze()  # the children would copy what they look through
    main()
