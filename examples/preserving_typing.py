"""Types survive the decorator: a type checker knows every argument and every result.

Check it with `mypy --strict examples/preserving_typing.py`.
"""

from typing import TYPE_CHECKING

from unsync import Unfuture, unsync


@unsync
def function_name(x: str) -> str:
    return x + "a"


@unsync
async def measure_length(task: Unfuture[str]) -> int:
    return len(await task)


if TYPE_CHECKING:
    # Never executed. In strict mode mypy reports an ignored error that does not exist,
    # so these lines prove that the mistakes in them are found.
    function_name(1)  # type: ignore[arg-type]
    function_name("b").result() + 1  # type: ignore[operator]
    function_name("b").then(measure_length).result() + "a"  # type: ignore[operator]


def main() -> None:
    future_result: Unfuture[str] = function_name("b")
    length: Unfuture[int] = future_result.then(measure_length)
    print(future_result.result())
    print(length.result())


if __name__ == "__main__":
    main()
