"""Programs that run inside a peer's own virtual environment; they import the peer and nothing of this package.

Each reads one JSON object a line from standard input, does what its "do" says, and answers with one line of JSON.
"""
