"""A subject for worker processes that imports nothing: it answers, fails, fills memory or hangs."""


class Subject:
    def answer(self, value):
        return {"value": value}

    def fail(self):
        raise ValueError("no")

    def fill(self):
        block = []
        while True:
            block.append(bytearray(b"x" * 10_000_000))

    def hang(self):
        while True:
            pass
