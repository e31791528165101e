"""Run by Alembic: migrates the open connection it is handed, within that transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
