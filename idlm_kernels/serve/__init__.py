"""A server with OpenAI's interface. Needs the extra `serve`.

One thread owns the engine (`worker`); `app` is the HTTP around it, `protocol` what a request may say, `answers` what
comes back, `gate` who gets in, `run` the process.
"""
