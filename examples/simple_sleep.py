"""Wait for a coroutine: first with asyncio alone, then with unsync."""

import asyncio

from unsync import unsync


async def sync_async() -> str:
    await asyncio.sleep(0.1)
    return "I hate event loops"


@unsync
async def unsync_async() -> str:
    await asyncio.sleep(0.1)
    return "I like decorators"


def main() -> None:
    print(asyncio.run(sync_async()))
    print(unsync_async().result())


if __name__ == "__main__":
    main()
