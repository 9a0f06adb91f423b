"""``python -m megaloop``: the command line, and how the local launcher starts a rank."""

from launchers.rank import follow_launcher

follow_launcher()

from megaloop.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
