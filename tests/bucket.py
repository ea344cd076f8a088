"""A bucket on the loopback address, with preconditions as Google's storage has them.

`gcp-storage-emulator` ignores `ifGenerationMatch`, on which the lock of a run depends.
As a program, `python -m tests.bucket PORT LOG`, it serves one bucket, `bucket`, in
memory, and appends one line per request to LOG. In it, `secret/` may not be listed, and
`fixed/` not be written.
"""

from collections import Counter
import contextlib
import http.server
import os
from pathlib import Path
import socket
import subprocess
import sys
import threading
import time
import urllib.request

BUCKET = 'bucket'


def serve(port: int, log: str) -> None:
  """Serves until the process ends."""
  from gcp_storage_emulator import server
  from gcp_storage_emulator.handlers import objects

  guard, insert, delete = threading.RLock(), objects.insert, objects.delete
  requests = open(log, 'a', buffering=1, encoding='utf-8')  # noqa: SIM115

  def matches(request, storage, name):
    """Whether the object has the generation that the request asks for, 0 for none."""
    wanted = request.query.get('ifGenerationMatch')
    if wanted is None:
      return True
    try:
      found = storage.get_file_obj(request.params['bucket_name'], name)['generation']
    except Exception:  # of a type of the emulator: there is no object
      found = '0'
    return found == wanted[0]

  def checked(change, name_of):
    def handle(request, response, storage, *args, **kwargs):
      if name_of(request).startswith('fixed/'):
        response.status = http.HTTPStatus.FORBIDDEN
        return None
      with guard:
        if matches(request, storage, name_of(request)):
          return change(request, response, storage, *args, **kwargs)
        response.status = http.HTTPStatus.PRECONDITION_FAILED
        return None

    return handle

  def name_of_insert(request):
    if 'name' in request.query:
      return request.query['name'][0]
    data = request.data or {}
    return data.get('name') or data.get('meta', {}).get('name')

  download = objects.download

  def with_generation(request, response, storage, *args, **kwargs):
    with guard:
      download(request, response, storage, *args, **kwargs)
      if response.status < http.HTTPStatus.BAD_REQUEST:
        params = request.params
        found = storage.get_file_obj(params['bucket_name'], params['object_id'])
        response['x-goog-generation'] = found['generation']

  listed = objects.ls

  def ls(request, response, storage, *args, **kwargs):
    if request.query.get('prefix', [''])[0].startswith('secret/'):
      response.status = http.HTTPStatus.FORBIDDEN
    else:
      listed(request, response, storage, *args, **kwargs)

  objects.download = with_generation
  replaced = {
    download: with_generation,
    listed: ls,
    insert: checked(insert, name_of_insert),
    delete: checked(delete, lambda request: request.params['object_id']),
  }
  objects.insert = replaced[insert]
  server.HANDLERS = tuple(
    (route, {method: replaced.get(call, call) for method, call in methods.items()})
    for route, methods in server.HANDLERS
  )

  class Handler(server.RequestHandler):
    protocol_version = 'HTTP/1.1'

    def send_response(self, code, message=None):
      super().send_response(code, message)
      if code >= http.HTTPStatus.BAD_REQUEST:  # the body may not have been read
        self.send_header('Connection', 'close')

    def log_message(self, format, *args):
      requests.write(f'{time.time():.3f} {self.command} {self.path}\n')

  class Storage(server.Storage):
    def create_file(self, *args, **kwargs):
      with guard:
        return super().create_file(*args, **kwargs)

  storage = Storage(use_memory_fs=True)
  server.buckets.create_bucket(BUCKET, storage)

  def handler(*args):
    return Handler(storage, *args)

  class Threaded(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

  Threaded(('127.0.0.1', port), handler).serve_forever()


class Bucket:
  """A server in a process of its own, which the environment variables point to."""

  def __init__(self, folder: Path, port: int = 0):
    self.log, self._process = folder / 'requests.log', None
    if not port:
      with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    self._port = port
    self.url = f'http://127.0.0.1:{port}'
    self.environment = {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
    }

  def start(self) -> None:
    """Starts the server with an empty bucket, and waits for its first answer."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, '-m', 'tests.bucket', str(self._port), str(self.log)]
    self._process = subprocess.Popen(
      command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
      with contextlib.suppress(OSError):
        urllib.request.urlopen(self.url, timeout=5).close()
        return
      time.sleep(0.05)
    raise TimeoutError('the emulator does not start')

  def stop(self) -> None:
    """Kills the server; what it held is lost."""
    if self._process is not None:
      self._process.kill()
      self._process.wait()

  def requests(self) -> Counter[str]:
    """How many requests of each method there have been."""
    lines = self.log.read_text(encoding='utf-8').splitlines()
    return Counter(line.split()[1] for line in lines)


if __name__ == '__main__':
  os.environ.pop('STORAGE_EMULATOR_HOST', None)
  serve(int(sys.argv[1]), sys.argv[2])
