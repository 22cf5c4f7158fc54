"""A process whose clocks jump, as those of a machine do when its time is set or when it was suspended."""

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Seconds by which a clock is ahead: the file has those of the wall clock and of the steady one. */
static long ahead(clockid_t id) {
    long wall = 0, steady = 0;
    FILE *file = fopen(getenv("TEST_CLOCKS"), "r");
    if (file) {
        if (fscanf(file, "%ld %ld", &wall, &steady) != 2) wall = steady = 0;
        fclose(file);
    }
    return id == CLOCK_REALTIME ? wall : id == CLOCK_MONOTONIC ? steady : 0;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed) now->tv_sec += ahead(id);
    return failed;
}

int clock_nanosleep(clockid_t id, int flags, const struct timespec *until, struct timespec *left) {
    static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_nanosleep");
    struct timespec own = *until;
    if (flags & TIMER_ABSTIME) own.tv_sec -= ahead(id);
    return real(id, flags, &own, left);
}

int sem_clockwait(sem_t *sem, clockid_t id, const struct timespec *until) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_clockwait");
    struct timespec own = *until;
    own.tv_sec -= ahead(id);
    return real(sem, id, &own);
}

int sem_timedwait(sem_t *sem, const struct timespec *until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec own = *until;
    own.tv_sec -= ahead(CLOCK_REALTIME);
    return real(sem, &own);
}
"""


class JumpingClocks:
    """The clocks of processes that are started with `environment`. Skips the test without a C compiler."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("clocks that jump need a C compiler")
        source, library, self._ahead = directory / "clocks.c", directory / "clocks.so", directory / "clocks"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.jump()
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCKS": str(self._ahead)}

    def jump(self, wall_s: int = 0, steady_s: int = 0) -> None:
        """Sets how far they are ahead of this machine's. A steady clock must not go back."""
        part = self._ahead.with_suffix(".part")
        part.write_text(f"{wall_s} {steady_s}")
        part.replace(self._ahead)
