"""A PostgreSQL of the tests' own: a fresh cluster in a temporary folder, on a free port, gone at the end."""

import glob
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.servers import free_port, kill_group, wait_for

START_SECONDS = 60.0


def find_binaries() -> Path | None:
    """The newest folder of initdb and postgres; Debian keeps them off the PATH."""
    versions = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda name: int(name.split("/")[4]))
    on_path = shutil.which("initdb")
    folders = [*versions, *([str(Path(on_path).resolve().parent)] if on_path else [])]
    return next((Path(folder) for folder in reversed(folders) if Path(folder, "initdb").exists()), None)


needs_postgres = pytest.mark.skipif(
    find_binaries() is None,
    reason="no PostgreSQL on this machine: make postgres, or apt-get install postgresql",
)


@contextmanager
def running_postgres() -> Iterator["Postgres"]:
    """An empty database with a user who has a password."""
    binaries = find_binaries()
    assert binaries is not None, "needs_postgres guards this"
    folder = Path(tempfile.mkdtemp(prefix="sft-postgres-"))
    postgres = Postgres(binaries, folder, free_port(), f"planted-{secrets.token_hex(12)}")
    try:
        postgres.create()
        with postgres.running():
            yield postgres
    finally:
        shutil.rmtree(folder)


@contextmanager
def database(kind: str) -> Iterator["Postgres | None"]:
    """None for "sqlite": Prefect makes its own file in PREFECT_HOME."""
    if kind == "sqlite":
        yield None
        return
    with running_postgres() as postgres:
        yield postgres


class Postgres:
    """One cluster. As root everything is done as another user: PostgreSQL refuses to be root."""

    def __init__(self, binaries: Path, folder: Path, port: int, password: str) -> None:
        self.binaries, self.folder, self.port, self.password = binaries, folder, port, password
        self.url = f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"
        self.log = folder / "postgres.log"

    def create(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if os.geteuid() == 0:
            user = unprivileged_user()
            for path in (self.folder, password_file):
                os.chown(path, user.pw_uid, user.pw_gid)
        words = ["--username=prefect", "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
        self.run("initdb", f"--pgdata={self.folder / 'data'}", "--no-sync", "--locale=C", *words)
        password_file.unlink()

    @contextmanager
    def running(self) -> Iterator[None]:
        """In the foreground and in a session of its own, so that one signal ends it."""
        words = ["-D", str(self.folder / "data"), "-h", "127.0.0.1", "-p", str(self.port)]
        command = self.command("postgres", *words, "-k", str(self.folder), "-c", "fsync=off")
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
            try:
                wait_for(self.is_up, f"the start of PostgreSQL: {self.log}", START_SECONDS)
                yield
            finally:
                kill_group(process.pid)
                process.wait()

    def is_up(self) -> bool:
        asked = subprocess.run(
            [self.binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)],
            capture_output=True,
            check=False,
        )
        return asked.returncode == 0

    def dump(self) -> bytes:
        """Every row of every table, as SQL."""
        words = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "--inserts", "postgres"]
        return self.run("pg_dump", *words)

    def run(self, program: str, *arguments: str) -> bytes:
        done = subprocess.run(
            self.command(program, *arguments),
            cwd=self.folder,
            env=os.environ | {"PGPASSWORD": self.password},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def command(self, program: str, *arguments: str) -> list[str]:
        words = [str(self.binaries / program), *arguments]
        if os.geteuid() != 0:
            return words
        user = unprivileged_user()
        change = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        return [*change, "--", *words]


def unprivileged_user() -> pwd.struct_passwd:
    names = {user.pw_name: user for user in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]
