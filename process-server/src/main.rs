//! Entry point of `reprotect-process-server`: parses the command line, starts logging, dispatches, and turns errors into an
//! exit status.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use reprotect_engine::host::logging;
use reprotect_engine::host::output::{EXIT_FAILED, EXIT_OK, EXIT_USAGE, Output};
use reprotect_process_server::cli::{Cli, Command};
use reprotect_process_server::commands;
use reprotect_process_server::config::Settings;

fn main() -> ExitCode {
    match dispatch(&Cli::parse()) {
        Ok(true) => ExitCode::from(EXIT_OK),
        Ok(false) => ExitCode::from(EXIT_FAILED),
        Err(error) => {
            eprintln!("reprotect-process-server: {error:#}");
            ExitCode::from(if commands::is_usage(&error) { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

/// Whether the command found everything as it should be.
fn dispatch(cli: &Cli) -> anyhow::Result<bool> {
    let output = Output::new(cli.global.json);
    let overrides = cli.global.overrides();
    if let Command::CheckConfig(args) = &cli.command {
        return commands::check_config(&overrides, args, output).map(|()| true);
    }
    let settings = Settings::load(&overrides)?;
    logging::init(&settings.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime's threads; look at the limits of the service")?;
    runtime.block_on(async {
        match &cli.command {
            Command::Run(args) => commands::run(settings, args).await.map(|()| true),
            Command::Check(_) => commands::check(&settings, output).await,
            Command::Enroll(args) => commands::enroll(&settings, args, output).await.map(|()| true),
            Command::Status(args) => commands::status(&settings, args, output).await.map(|()| true),
            Command::CheckConfig(_) => Ok(true), // done above, it needs no settings
        }
    })
}
