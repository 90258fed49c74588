"""`dinocell doctor`."""

import typer

from dinocell.cli.options import App

app = App()


@app.command()
def doctor() -> None:
    """Check this installation, and say how to repair what is wrong.

    Shows versions, processor, GPU and precision, which extras are installed, where compiled functions and
    temporary files go, whether the bundled models can be loaded, and other packages of the same names. A
    report of a bug needs this list. The exit code is 1 if something must be repaired.

    Example: `dinocell doctor`
    """
    from dinocell.doctor import examine, report

    findings = examine()
    print(report(findings))
    if any(finding.cure for finding in findings):
        raise typer.Exit(1)
