"""The server that `flows/local_prefect.py` starts: `flows/child.py flows.local_server DESCRIPTOR`.

Prefect's API without interface and background services, on a socket that the parent has opened.
"""

import sys


def main() -> None:
    """Serve until we are told to stop."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, fd=int(sys.argv[1]), log_level="error", lifespan="on")


if __name__ == "__main__":
    main()
