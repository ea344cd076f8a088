"""A file of rows of text that grows, also where nothing can be appended."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
import time

from cmjax.runtime import paths

WRITE_S = 5.0  # least time between writes of an object


class RowFile:
  """Adds rows to the end of a file, which need not exist.

  A local file has each row at once. An object in a bucket is written anew, in a thread,
  when a row is added and `WRITE_S` have passed; `flush` writes what is left. A kill
  loses rows since the last write, so call `flush` before what must not be ahead of
  them, such as a checkpoint.

  Raises: whatever writing raises, also of an earlier write in the thread.
  """

  def __init__(self, path: Path):
    self._path, self._file = path, None
    if not paths.remote(path):
      self._file = path.open('a', encoding='utf-8')
      return
    self._content = path.read_bytes() if path.exists() else b''
    self._writer = ThreadPoolExecutor(1, thread_name_prefix='rows')
    self._writing: Future[None] | None = None
    self._unwritten, self._written_s = False, time.monotonic()

  def add(self, row: str) -> None:
    """Adds a row, which is without a line break."""
    if self._file is not None:
      self._file.write(f'{row}\n')
      self._file.flush()
      return
    self._content += f'{row}\n'.encode()
    self._unwritten = True
    if self._writing is None or self._writing.done():
      self._finish()
      if time.monotonic() - self._written_s > WRITE_S:
        self._start()

  def flush(self) -> None:
    """Writes all rows, and waits until they are stored."""
    if self._file is None:
      self._finish()
      if self._unwritten:
        self._start()
        self._finish()

  def close(self) -> None:
    """Writes all rows, and closes the file."""
    if self._file is not None:
      self._file.close()
      return
    try:
      self.flush()
    finally:
      self._writer.shutdown(wait=False)

  def _start(self) -> None:
    content = self._content
    self._writing = self._writer.submit(paths.write_bytes, self._path, content)
    self._unwritten, self._written_s = False, time.monotonic()

  def _finish(self) -> None:
    writing, self._writing = self._writing, None
    if writing is not None:
      try:
        writing.result()
      except BaseException:
        self._unwritten = False  # so that `close` does not try again
        raise
