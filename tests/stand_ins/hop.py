"""A service that forwards everything."""

from runtime.service import Boot, run, run_text_service


def main(boot: Boot) -> None:
    run_text_service(boot, lambda batch: batch)


if __name__ == "__main__":
    run(main)
