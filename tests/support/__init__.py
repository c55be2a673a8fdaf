"""Helpers that tests share.

How a new test stays cheap:

- Test a decision as a pure function in ``tests/unit``, with ``virtual.run_virtual`` where time passes.
- In ``tests/server`` use the fixtures ``gateway`` and ``recordings``. ``make_gateway`` costs 0.3 s. ``triton_with`` and
  ``Backend`` cost 2 s of CPU time with ``copy_repository(…, warm=False)``, so share them by a fixture of the module.
- Wait by ``commands.until``, never by a fixed sleep. Shorten intervals and time limits by settings.
- Send no more audio than the behaviour needs: a second of it costs about 50 ms of CPU time. Make the answer that several tests
  compare with once, in a fixture of the module; keep what depends on files only by ``cache.cached``.
- Mark a variant as ``slow`` if it takes more than ten seconds and a shorter test shows the behaviour. Add a file that takes
  more than a minute to ``LONGEST`` in ``tests/conftest.py``.
"""
