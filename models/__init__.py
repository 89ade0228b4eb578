import util  # noqa: F401  before torch, see util/threads.py
