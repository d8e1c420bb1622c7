import asyncio, time


class Pace:
    def __init__(self, max_concurrency, rpm=None, tpm=None, give_up_after=600.0):
        self.window = max_concurrency
        self.in_flight = 0
        self.hold = 0

    async def turn(self, tokens=0):
        while (w := self.hold - time.monotonic()) > 0:
            await asyncio.sleep(w)
        self.in_flight += 1
        return time.monotonic()

    def accepted(self, *a):
        self.in_flight -= 1

    failed = accepted

    def refused(self, now, ticket, headers, error):
        self.in_flight -= 1
        self.hold = now + float(headers.get("Retry-After", 1))

    def __str__(self):
        return ""
